"""The values of ``sampling.solver``: which objective each solver needs, and what a step of it costs."""

from dataclasses import dataclass

from data_sharding.errors import UserError

DDPM_LEVELS = 1000  # of noise, in training


@dataclass(frozen=True)
class SolverFacts:
    name: str
    objective: str  # of the networks that it samples from: flow or ddpm
    evaluations: int | None  # NFE of a step; None: its steps are adaptive


SOLVERS = (
    SolverFacts("euler", "flow", 1),
    SolverFacts("heun", "flow", 2),
    SolverFacts("dopri5", "flow", None),
    SolverFacts("sde", "flow", 1),
    SolverFacts("ddpm", "ddpm", 1),
    SolverFacts("ddim", "ddpm", 1),
)


def solver_facts(name: str) -> SolverFacts:
    return next(solver for solver in SOLVERS if solver.name == name)


def misfit(name: str, objective: str) -> str | None:
    """The sentence about a solver ``name`` that cannot sample from a network that was trained for ``objective``; None
    if it can."""
    needs = solver_facts(name).objective
    if needs == objective:
        return None
    *others, last = (solver.name for solver in SOLVERS if solver.objective == objective)
    return (
        f"sampling.solver is {name}, which is for objective={needs}, and this network's is {objective}: use "
        f"{', '.join(others)} or {last}"
    )


def require_fitting(name: str, objective: str) -> None:
    """Raises UserError with the sentence of ``misfit``, if there is one."""
    if problem := misfit(name, objective):
        raise UserError(problem)
