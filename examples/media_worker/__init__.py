"""A worker without a database: it processes users' files, and tells a separate data service."""
