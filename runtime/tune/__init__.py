"""``moedge tune``: the gather share that reaches a wanted speed, or stays within a wanted loss, on one target."""
