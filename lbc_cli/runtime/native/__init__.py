"""Native kernels for CPUs: C++ sources with a C interface (`kernels.h`), compiled when lbc is installed.

    compile     the compiler, its flags, the shared library     library     the library as Python sees it
    hook        compiles while a wheel is built

Nothing is imported here: the build loads `compile` and `hook` by their paths, before lbc is installed.
"""
