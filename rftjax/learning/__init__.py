"""From scored trajectories to new weights: minibatches, the update, the optimizer."""
