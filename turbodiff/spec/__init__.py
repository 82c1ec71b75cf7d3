"""WHAT IS ASKED: the nouns that every other room shares, as frozen pydantic models.

Contents: request, plan, model facts, shape arithmetic, events, errors.
Never here: torch, files of weights, devices, decisions.
Used by: everybody.
"""
