//! Microbenchmarks (issue: GPU kernels). Nothing here yet but the place.
