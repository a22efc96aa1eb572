"""What all layer-parallel networks share: agreement of the ranks, messages, random numbers, and the base module."""
