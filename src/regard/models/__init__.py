"""Networks built from the mechanisms, one file each, by domain."""
