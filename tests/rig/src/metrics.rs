//! Reading a process's admin port.

use std::collections::BTreeMap;
use std::fmt::Display;
use std::net::SocketAddr;
use std::time::Duration;

use bytes::Bytes;
use http::{Request, StatusCode};
use http_body_util::{BodyExt as _, Empty};
use hyper_util::rt::TokioIo;
use tokio::net::{TcpStream, ToSocketAddrs};
use tokio::time::timeout;

/// The samples of one scrape.
#[derive(Clone, Debug, Default)]
pub struct Metrics(Vec<Sample>);

/// One line of a scrape.
#[derive(Clone, Debug)]
struct Sample {
    name: String,
    labels: BTreeMap<String, String>,
    value: f64,
}

impl Metrics {
    /// Reads `/metrics`.
    ///
    /// # Errors
    /// When the port does not answer with 200.
    pub async fn scrape(admin: SocketAddr) -> Result<Self, String> {
        let (status, text) = get(admin, "/metrics").await?;
        if status != StatusCode::OK {
            return Err(format!("{admin}/metrics answers {status}"));
        }
        Ok(Self::parse(&text))
    }

    /// Reads the text of a scrape.
    pub fn parse(text: &str) -> Self {
        Self(text.lines().filter_map(Sample::parse).collect())
    }

    /// The sum of all series of this name with these labels.
    pub fn sum(&self, name: &str, labels: &[(&str, &str)]) -> f64 {
        let matches = |sample: &&Sample| {
            let has = |(k, v): &(&str, &str)| sample.labels.get(*k).is_some_and(|have| have == v);
            sample.name == name && labels.iter().all(has)
        };
        self.0.iter().filter(matches).map(|sample| sample.value).sum()
    }
}

impl Sample {
    fn parse(line: &str) -> Option<Self> {
        if line.starts_with('#') {
            return None;
        }
        let (series, value) = line.rsplit_once(' ')?;
        let (name, labels) = match series.split_once('{') {
            Some((name, labels)) => (name, labels.strip_suffix('}')?),
            None => (series, ""),
        };
        // No label value of ours holds a comma behind a quote.
        let labels = labels.split("\",").filter_map(|pair| {
            let (key, value) = pair.split_once("=\"")?;
            Some((key.to_owned(), value.trim_end_matches('"').to_owned()))
        });
        Some(Self { name: name.to_owned(), labels: labels.collect(), value: value.parse().ok()? })
    }
}

/// One GET over a connection of its own.
///
/// # Errors
/// What failed, in words.
pub async fn get(
    addr: impl ToSocketAddrs + Display,
    path: &str,
) -> Result<(StatusCode, String), String> {
    let ask = async {
        let stream = TcpStream::connect(&addr).await.map_err(|error| error.to_string())?;
        let (mut sender, connection) =
            hyper::client::conn::http1::handshake::<_, Empty<Bytes>>(TokioIo::new(stream))
                .await
                .map_err(|error| error.to_string())?;
        let request = Request::get(path).header("host", addr.to_string()).body(Empty::new());
        let request = request.map_err(|error| error.to_string())?;
        let answer = async {
            let response = sender.send_request(request).await.map_err(|e| e.to_string())?;
            let status = response.status();
            let body = response.into_body().collect().await.map_err(|e| e.to_string())?;
            Ok((status, String::from_utf8_lossy(&body.to_bytes()).into_owned()))
        };
        tokio::pin!(connection);
        tokio::pin!(answer);
        tokio::select! {
            answer = &mut answer => answer,
            _ = &mut connection => answer.await,
        }
    };
    timeout(TIMEOUT, ask).await.map_err(|_| format!("{addr}{path} does not answer"))?
}

const TIMEOUT: Duration = Duration::from_secs(10);
