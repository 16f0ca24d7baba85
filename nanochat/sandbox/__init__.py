"""Programs that a model wrote, run where they can do no harm.

    syscalls      the system calls a Python program needs, as a seccomp filter
    confinement   the barriers: namespaces, a root of its own, limits, Landlock, seccomp
    values        plain values as JSON, for two processes of which one must not trust the other
    program       what a confined process does: run a text, answer calls, or test
    worker        a warm process that forks a confined one for each program
    workers       workers as their owner sees them: started, asked, replaced
    execution     run a program, or judge a function by a test in another process
    check         python -m nanochat.sandbox.check: what this kernel grants

May import: command.
"""
