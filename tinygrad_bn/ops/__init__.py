"""The ops, one file a family: forward, derivative rule and sample domain side by side."""
