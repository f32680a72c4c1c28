"""Readers and packing: documents to token windows that remember where they came from."""
