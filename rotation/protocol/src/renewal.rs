//! SVID renewal.
