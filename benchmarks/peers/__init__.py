"""Peers: what others use for the same work, each at the best sensible settings that are known for it."""
