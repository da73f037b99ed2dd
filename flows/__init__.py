"""Prefect flows: ingest, retrain, monitor, promote, rollback. Each works in a workspace and needs no server."""
