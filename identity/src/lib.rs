//! The CA and the identity service
