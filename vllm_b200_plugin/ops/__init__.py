"""Our torch ops: schema, fake, CPU reference and documented wrapper, one module per family."""
