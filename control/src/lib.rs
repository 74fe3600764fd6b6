//! Discovery on Linkerd's destination API
