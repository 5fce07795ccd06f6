"""How the embedded models and data were made: python -m pretrain. Running the chapters needs none of it."""
