"""Speed and memory beside other implementations, on real proteins: what ``proteinbert-fast bench`` runs.

`registry` lists the groups. A group's module has ``cases(setup)``, cheap to call, and each case prepares itself when
it is its turn; tests, timing and the memory measurement all start from the same `Setup`. Nothing is timed whose
result has not been checked.
"""
