"""Layer scales: small updates in shallow layers, large in deep ones (E5; after LiNeS, arXiv 2410.17146)."""


def layer_scales(num_layers: int, gamma: float) -> list[float]:
    """lambda_l = gamma + (1 - gamma) * l / (L - 1) for l = 0 .. L-1, from shallow to deep.

    Args:
        num_layers: L, the layers of one tower that take part in the forward result (a ViT whose features are
            read before its last layer counts without that layer).
        gamma: scale of the shallowest layer; 1 switches the scaling off and gives KeepLoRA (arXiv
            2601.19659).

    Returns:
        L fractions; [1.0] for L = 1, where shallow and deep are the same layer.

    Raises:
        ValueError: num_layers < 1, or gamma outside [0, 1].
    """
    if num_layers < 1:
        raise ValueError(f"num_layers must be at least 1, got {num_layers}")
    if not 0.0 <= gamma <= 1.0:
        raise ValueError(f"gamma must lie in [0, 1], got {gamma!r}")
    if num_layers == 1:
        return [1.0]
    deepest = num_layers - 1
    # Written as a weighted sum so that both ends are exact in floating point.
    return [gamma * ((deepest - layer) / deepest) + layer / deepest for layer in range(num_layers)]
