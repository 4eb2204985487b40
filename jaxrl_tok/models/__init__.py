"""Policies: the decoder, the families it reads, Hugging Face directories."""
