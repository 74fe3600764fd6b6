//! The standalone platform.
