"""Peers: what others use for the same work, each at the best sensible settings that are known for it.

All but Huey run in environments of their own (scripts/setup-peers), where nothing of Conveyor is installed.
"""
