"""snaptree's own mover: merging layers by bringing clusters from some files into another, copied or shared.

``cost.foreseen`` says what a merge would cost, ``merging.merge`` carries it out; both ask ``mapping`` what each cluster
gets. ``target`` and ``refcounts`` write in the order in which a crash loses nothing, ``copying`` and ``sharing`` bring
the data over.
"""
