"""The paper's guarantee as code (`guarantee`), and its statements tried on small MDPs (`checks`)."""
