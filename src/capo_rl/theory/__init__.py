"""The paper's guarantee as code (`guarantee`); its `statements` tried on small MDPs, and `counterexamples` to those
that fail; `checks` prints the tables of both."""
