"""The drafters: whatever proposes tokens for the verifier to check."""
