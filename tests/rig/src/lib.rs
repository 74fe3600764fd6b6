//! Real processes, namespaces and load for the tests that cross crates
