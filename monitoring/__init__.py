"""Watching: references, drift by site, verdicts and their pages. Imports smearline, and nothing calls home."""
