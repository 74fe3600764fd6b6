//! What steadfast-rotation tells: how a rotation stands, and what everybody answered last.

use std::net::SocketAddr;
use std::path::Path;

use steadfast_rotation_protocol::census::Round;
use steadfast_rotation_protocol::controller::Standing;

use crate::admin::{self, AdminError};
use crate::commands::identity::pods;
use crate::store::StoreProblem;

/// Where steadfast-rotation is asked.
#[derive(Clone, Debug, clap::Args)]
pub(crate) struct ControllerArg {
    /// The admin port of steadfast-rotation [default: as its Pod says]
    #[arg(long, value_name = "ADDR")]
    rotation_admin: Option<SocketAddr>,
}

impl ControllerArg {
    /// At this address.
    pub(crate) const fn at(admin: SocketAddr) -> Self {
        Self { rotation_admin: Some(admin) }
    }
}

/// Why the controller does not tell.
#[derive(Debug, thiserror::Error)]
pub(crate) enum ControllerError {
    #[error("no steadfast-rotation answers, and nothing moves while none runs")]
    Admin(#[from] AdminError),
    #[error(
        "this mesh has no Pod of the service account steadfast-rotation that says where its admin \
         port is: nothing moves while no steadfast-rotation runs (or name it with --rotation-admin)"
    )]
    NoPod,
    #[error(transparent)]
    Store(#[from] StoreProblem),
}

/// A controller that answers.
#[derive(Clone, Debug)]
pub(crate) struct Controller {
    admin: SocketAddr,
}

impl Controller {
    /// The one to ask, and what it says: of several, the one that leads, or has looked last.
    ///
    /// # Errors
    /// [`ControllerError`]
    pub(crate) async fn find(
        dir: &Path,
        arg: &ControllerArg,
    ) -> Result<(Self, Standing), ControllerError> {
        let addresses = match arg.rotation_admin {
            Some(admin) => vec![admin],
            None => {
                let pods = pods(dir).await?.into_iter();
                let ours = pods.filter(|pod| pod.account.as_deref() == Some(SERVICE_ACCOUNT));
                ours.filter_map(|pod| pod.admin).collect()
            }
        };
        let (mut best, mut failed): (Option<(Self, Standing)>, _) = (None, ControllerError::NoPod);
        for admin in addresses {
            let controller = Self { admin };
            match controller.standing().await {
                Ok(standing) => {
                    let rank = |standing: &Standing| (standing.leads, standing.seen_at);
                    if best.as_ref().is_none_or(|(_, best)| rank(best) < rank(&standing)) {
                        best = Some((controller, standing));
                    }
                }
                Err(error) => failed = error.into(),
            }
        }
        best.ok_or(failed)
    }

    /// How things stand.
    ///
    /// # Errors
    /// [`AdminError`]
    pub(crate) async fn standing(&self) -> Result<Standing, AdminError> {
        admin::json(self.admin, "/rotation.json").await
    }

    /// What everybody answered last; `None`: nobody was asked yet.
    ///
    /// # Errors
    /// [`AdminError`]
    pub(crate) async fn round(&self) -> Result<Option<Round>, AdminError> {
        admin::json(self.admin, "/round.json").await
    }
}

const SERVICE_ACCOUNT: &str = "steadfast-rotation";
