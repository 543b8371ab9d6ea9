"""The range of an energy share (eps_w of E1, eps_f of E8). No torch: settings are checked before it loads."""


def check_energy(energy: float, name: str = "energy") -> None:
    """Raises ValueError unless `energy` is a fraction in (0, 1]."""
    if not 0.0 < energy <= 1.0:
        raise ValueError(
            f"{name} must lie in (0, 1], got {energy!r}: it is the share of squared singular values to keep"
        )
