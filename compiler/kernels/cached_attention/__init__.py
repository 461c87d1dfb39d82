"""Attention of new tokens over the slots of their own rows that they see, and no others."""
