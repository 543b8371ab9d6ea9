"""The range of an energy share (eps_w of E1, eps_f of E8)."""


def check_energy(energy: float) -> None:
    """Raises ValueError unless `energy` is a fraction in (0, 1]."""
    if not 0.0 < energy <= 1.0:
        raise ValueError(
            f"energy must lie in (0, 1], got {energy!r}: it is the share of squared singular values to keep"
        )
