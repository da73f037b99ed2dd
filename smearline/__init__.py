"""Smearline: from blood-smear images and blood counts to a recogniser and a diagnosis that can be judged."""

__version__ = "0.1.0"
