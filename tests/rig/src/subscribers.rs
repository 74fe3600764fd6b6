//! Who asks control what sidecars ask: a stream for each name, and none of them is ever done.

use std::collections::BTreeSet;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use anyhow::Context as _;
use linkerd2_proxy_api::destination::destination_client::DestinationClient;
use linkerd2_proxy_api::destination::{GetDestination, Update, update};
use linkerd2_proxy_api::net::TcpAddress;
use prometheus_client::registry::Registry;
use steadfast_identity_client::{Connector, Expected, Identity};
use steadfast_process::{Clock as _, Drain, Readiness, SystemClock};
use tokio::task::JoinSet;
use tonic::transport::{Channel, Endpoint};

use crate::swarm;

/// So many connections to control, as the workload whose folder is in `dir`. Each follows the name
/// with the number 0, and its share of the others: `<prefix><number><suffix>`. Says of each change
/// when it came (Unix time in ms), on which connection, and how many endpoints the name now has.
///
/// # Errors
/// A folder that is none, or a stream that ends.
pub async fn run(
    identity: &str,
    control: &str,
    dir: &Path,
    names: (&str, usize, &str),
    connections: usize,
) -> anyhow::Result<()> {
    let (prefix, count, suffix) = names;
    let folders: Vec<_> = swarm::folders(dir)?;
    let config = swarm::config(identity, dir, folders.first().context("no workload")?)?;
    let (readiness, mut registry) = (Readiness::new(), Registry::default());
    let server_name = swarm::name("steadfast-control", "steadfast")?;
    let expected = Expected { id: server_name.spiffe_id(), server_name };
    let identity = Identity::new(config, Arc::new(SystemClock), &readiness, &mut registry)?;
    let (contexts, refusals) = (identity.contexts(), identity.refusals());
    let mut running = JoinSet::new();
    running.spawn(async move {
        identity.run(Drain::new()).await?;
        anyhow::bail!("the identity has ended")
    });
    for connection in 0..connections {
        let connector =
            Connector::new(contexts.clone(), control, expected.clone(), refusals.clone());
        let endpoint = Endpoint::from_static("http://control");
        let channel = endpoint.connect_with_connector_lazy(connector);
        let share = (0..count).filter(|number| *number == 0 || number % connections == connection);
        for number in share {
            let name = format!("{prefix}{number}{suffix}");
            running.spawn(follow(channel.clone(), connection, name));
        }
    }
    match running.join_next().await {
        Some(ended) => ended?,
        None => anyhow::bail!("there is nobody to ask"),
    }
}

/// As a sidecar does it: a stream that could not be had is asked for again.
async fn follow(channel: Channel, connection: usize, path: String) -> anyhow::Result<()> {
    let mut known = BTreeSet::new();
    loop {
        let lookup = GetDestination { path: path.clone(), ..GetDestination::default() };
        match DestinationClient::new(channel.clone()).get(lookup).await {
            Ok(stream) => {
                let mut stream = stream.into_inner();
                while let Some(message) = stream.message().await? {
                    apply(&mut known, message);
                    let now = SystemClock.now().as_millis();
                    println!("{now} {connection} {path} {}", known.len());
                }
                anyhow::bail!("the stream of {path} has ended");
            }
            Err(status) => eprintln!("{path}: {status}"),
        }
        tokio::time::sleep(AGAIN_AFTER).await;
    }
}

fn apply(known: &mut BTreeSet<String>, message: Update) {
    let key = |addr: &TcpAddress| format!("{addr:?}");
    match message.update {
        Some(update::Update::Add(set)) => {
            known.extend(set.addrs.iter().filter_map(|weighted| weighted.addr.as_ref()).map(key));
        }
        Some(update::Update::Remove(set)) => {
            for addr in &set.addrs {
                known.remove(&key(addr));
            }
        }
        Some(update::Update::NoEndpoints(_)) => known.clear(),
        None => {}
    }
}

const AGAIN_AFTER: Duration = Duration::from_millis(500);
