//! What steadfast-rotation tells: how a rotation stands, and what everybody answered last.

use std::net::SocketAddr;
use std::time::Duration;

use steadfast_api::UnixTime;
use steadfast_rotation_protocol::census::Round;
use steadfast_rotation_protocol::controller::Standing;
use tokio::time::{Instant, sleep};

use crate::admin::{self, AdminError, Port};
use crate::mesh::{Mesh, StoreProblem};

/// Where steadfast-rotation is asked.
#[derive(Clone, Debug, Default, clap::Args)]
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
    admin: Port,
}

impl Controller {
    /// The one to ask, and what it says: of several, the one that leads, or has looked last.
    ///
    /// # Errors
    /// [`ControllerError`]
    pub(crate) async fn find(
        mesh: &Mesh,
        arg: &ControllerArg,
    ) -> Result<(Self, Standing), ControllerError> {
        let addresses = match arg.rotation_admin {
            Some(admin) => vec![Port::Addr(admin)],
            None => {
                let pods = mesh.pods().await?.into_iter();
                pods.filter(|pod| mesh.is_controller(pod)).filter_map(|pod| pod.admin).collect()
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
        admin::json(&self.admin, "/rotation.json").await
    }

    /// What everybody answered last; `None`: nobody was asked yet.
    ///
    /// # Errors
    /// [`AdminError`]
    pub(crate) async fn round(&self) -> Result<Option<Round>, AdminError> {
        admin::json(&self.admin, "/round.json").await
    }

    /// What everybody has answered to a query that was asked since then; if none is in time, what
    /// there is.
    ///
    /// # Errors
    /// [`AdminError`]
    pub(crate) async fn round_since(&self, since: UnixTime) -> Result<Option<Round>, AdminError> {
        let end = Instant::now() + ROUND_WAIT;
        loop {
            let round = self.round().await?;
            let is_new = round.as_ref().is_some_and(|round| asked_at(round) >= since);
            if is_new || Instant::now() >= end {
                return Ok(round);
            }
            sleep(LOOK_EVERY).await;
        }
    }
}

/// When a round was asked for: its nonce is the time in microseconds.
pub(crate) const fn asked_at(round: &Round) -> UnixTime {
    UnixTime::from_millis(round.nonce / 1000)
}

/// The controller asks everybody every ten seconds, though no phase waits for it.
const ROUND_WAIT: Duration = Duration::from_secs(12);
const LOOK_EVERY: Duration = Duration::from_millis(250);

#[cfg(test)]
mod tests {
    use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
    use tokio::net::TcpListener;

    use super::*;

    #[tokio::test]
    async fn answers_of_before_are_not_taken_while_newer_ones_come() {
        let since = UnixTime::from_secs(1_800_000_000);
        let asked = [since - Duration::from_secs(8), since + Duration::from_secs(1)];
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let controller = Controller { admin: Port::Addr(listener.local_addr().unwrap()) };
        let serve = async {
            for asked in asked {
                let (mut stream, _) = listener.accept().await.unwrap();
                let _ = stream.read(&mut [0; 4096]).await.unwrap();
                let round = Round { nonce: asked.as_millis() * 1000, ..Round::default() };
                let body = serde_json::to_string(&round).unwrap();
                let head = format!(
                    "HTTP/1.1 200 OK\r\ncontent-length: {}\r\nconnection: close\r\n\r\n",
                    body.len()
                );
                stream.write_all((head + &body).as_bytes()).await.unwrap();
            }
        };
        let (round, ()) = tokio::join!(controller.round_since(since), serve);
        assert_eq!(asked_at(&round.unwrap().unwrap()), asked[1]);
    }
}
