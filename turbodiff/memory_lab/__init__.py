"""WHAT PROVES THE PLAN: the ledger of live bytes, dry runs on meta tensors, measurements on a card."""
