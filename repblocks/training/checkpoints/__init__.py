"""Runs that may be killed: what is written when, and how it goes on from there."""
