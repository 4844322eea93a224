"""Problems made here, without end and without a download: `arithmetic` for the embedded model, `sentences` for a
pretrained one."""
