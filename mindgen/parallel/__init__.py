"""Ranks, the groups they talk in, how they are started and how a lost one is noticed."""
