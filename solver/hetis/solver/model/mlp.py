"""The kinds of MLP: values that say what weights a layer's MLP has, and how many of them tokens use."""

from __future__ import annotations

from dataclasses import dataclass

from hetis.solver.errors import InvalidProblemError


@dataclass(frozen=True, slots=True, kw_only=True)
class Mlp:
    """Two matrices between the hidden size and a width, or three if it is gated. The base of both kinds."""

    gated: bool = True

    @property
    def matrices(self) -> int:
        return 3 if self.gated else 2

    @property
    def inner(self) -> int:
        """The numbers of a token between its products."""
        raise NotImplementedError

    def params(self, hidden: int) -> float:
        """Return all parameters."""
        raise NotImplementedError

    def active_params(self, hidden: int) -> float:
        """Return the parameters that one token uses."""
        return self.params(hidden)

    def touched_params(self, hidden: int, tokens: float) -> float:
        """Return the parameters that a batch of ``tokens`` reads, which may be an array."""
        return self.params(hidden)


@dataclass(frozen=True, slots=True, kw_only=True)
class Dense(Mlp):
    """An MLP that every token uses whole."""

    width: int

    @property
    def inner(self) -> int:
        return self.width

    def params(self, hidden: int) -> float:
        return self.matrices * hidden * self.width


@dataclass(frozen=True, slots=True, kw_only=True)
class Experts(Mlp):
    """A mixture of experts: a router chooses ``active`` of ``count`` for every token; shared ones are always used.

    Attributes:
        width: width of one routed expert.
        shared_width: width of all shared experts together.
        latent: size to which a token is projected for routed experts, and from which it is projected back; None: they
            compute with the hidden size (Nemotron-3 Super and Kimi K3 have latent experts).
    """

    count: int
    active: int
    width: int
    shared_width: int = 0
    latent: int | None = None

    def __post_init__(self) -> None:
        if not 1 <= self.active <= self.count:
            raise InvalidProblemError(f"moe.active_experts is {self.active}, must be 1 to num_experts ({self.count})")

    @property
    def inner(self) -> int:
        return self.active * self.width + self.shared_width

    def size(self, hidden: int) -> int:
        """Return the numbers of a token with which routed experts compute."""
        return hidden if self.latent is None else self.latent

    def expert_params(self, hidden: int) -> int:
        """Return the parameters of one routed expert."""
        return self.matrices * self.size(hidden) * self.width

    def shared_params(self, hidden: int) -> int:
        """Return the parameters of shared experts."""
        return self.matrices * hidden * self.shared_width

    def fixed_params(self, hidden: int) -> int:
        """Return the parameters that every token uses: router, shared experts, projections to and from the latent."""
        projections = 0 if self.latent is None else 2 * hidden * self.latent
        return hidden * self.count + self.shared_params(hidden) + projections

    def params(self, hidden: int) -> float:
        return self.fixed_params(hidden) + self.count * self.expert_params(hidden)

    def active_params(self, hidden: int) -> float:
        return self.fixed_params(hidden) + self.active * self.expert_params(hidden)

    def touched_params(self, hidden: int, tokens: float) -> float:
        return self.fixed_params(hidden) + self.touched(tokens) * self.expert_params(hidden)

    def touched(self, tokens: float) -> float:
        """Return the expected routed experts that ``tokens`` touch under even routing, ``E (1 - (1 - k/E)^tokens)``."""
        missed: float = (1.0 - self.active / self.count) ** tokens
        return self.count * (1.0 - missed)

    def activation_elements(self, hidden: int, tokens: float, slices: int = 1) -> float:
        """Return the numbers that routed experts move for ``tokens`` tokens on one rank.

        Every token's row of the size it has, and its row between an expert's products, are read and written by each of
        its experts. ``slices`` ranks share each expert, and with it the rows between its products only.
        """
        return 4.0 * tokens * self.active * (self.size(hidden) + self.width / slices)
