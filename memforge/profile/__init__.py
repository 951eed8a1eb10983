"""The measured side: what torch counts and holds, beside what the ledger says."""
