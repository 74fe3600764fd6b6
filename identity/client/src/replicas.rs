//! Connections to each replica of the identity service, for who must speak to all of them.

use std::collections::BTreeSet;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::Arc;

use steadfast_process::ErrorChain;
use tonic::transport::Channel;

use crate::dial::{DialError, Dialer};
use crate::token;

/// Dials replicas, recognised by the newest bundle that this process holds.
#[derive(Clone)]
pub struct Replicas {
    pub(crate) dialer: Arc<Dialer>,
    pub(crate) token_file: PathBuf,
}

impl Replicas {
    /// The addresses that the identity service has now, each of a replica, in their order.
    ///
    /// # Errors
    /// A name that does not resolve.
    pub async fn addresses(&self) -> Result<BTreeSet<SocketAddr>, DialError> {
        Ok(self.dialer.resolve().await?.into_iter().collect())
    }

    /// A connection to the replica at this address.
    ///
    /// # Errors
    /// [`DialError`]
    pub async fn dial(&self, replica: SocketAddr) -> Result<Channel, DialError> {
        self.dialer.channel_at(replica).await
    }

    /// Our token, read anew.
    ///
    /// # Errors
    /// What is wrong with the file.
    pub fn token(&self) -> Result<Vec<u8>, String> {
        token::read(&self.token_file).map_err(|error| ErrorChain(&error).to_string())
    }
}
