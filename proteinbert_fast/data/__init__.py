"""Reading what models are fed with: FASTA so far."""
