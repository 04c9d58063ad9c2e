"""Bytes by URL: one retry for all reads and writes, one store contract for local folders and S3."""
