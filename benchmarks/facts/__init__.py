"""More facts per FLOP? Memory layers beside dense models, mixtures of experts and PEER, by one command."""
