"""The models of the zoo: suites of cases, each a name with a builder and inputs of any batch size."""
