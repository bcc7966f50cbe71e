//! The driver path without libcuda and the bootable image (issue: runtime-uk). Nothing here yet but the place.
#![no_std]
