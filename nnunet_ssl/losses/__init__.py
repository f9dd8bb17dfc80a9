"""Terms that methods share: pseudo-labels, masked Dice, ramps."""
