"""WHAT IS ASKED: the nouns that every other room shares, as frozen pydantic models.

Lives here: request, plan, model facts, shape arithmetic, events, errors.
Never here: torch, files of weights, devices, decisions.
Who may knock: everybody.
"""
