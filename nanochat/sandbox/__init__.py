"""Programs that a model wrote, run where they can do no harm.

    confinement   the barriers: Landlock, seccomp, resource limits
    execution     run one program, return what it printed and how it ended

May import: nothing.
"""
