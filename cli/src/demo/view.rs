//! The live view: one screen of 80 columns and 24 lines, drawn from a [`Screen`] and nothing else.

use std::time::Duration;

use ratatui::Frame;
use ratatui::layout::{Constraint, Layout, Rect};
use ratatui::style::{Color, Modifier, Style};
use ratatui::text::{Line, Span};
use ratatui::widgets::{Paragraph, Wrap};
use steadfast_process::duration;

use super::observe::{EdgeRow, Ends, Screen, WorkloadRow};
use super::summary::percent;

/// How the view looks where colours are not wanted.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Look {
    pub(crate) colours: bool,
}

/// Draws everything.
pub(crate) fn draw(frame: &mut Frame<'_>, screen: &Screen, note: &str, look: Look) {
    let edge_lines = 2 * u16::try_from(screen.edges.len()).unwrap_or(0);
    let workload_lines = u16::try_from(screen.workloads.len()).unwrap_or(0);
    let areas = Layout::vertical([
        Constraint::Length(2),
        Constraint::Length(edge_lines + 2),
        Constraint::Length(workload_lines + 2),
        Constraint::Min(1),
        Constraint::Length(1),
    ])
    .split(frame.area());
    let mut show = |area: Rect, lines: Vec<Line<'_>>| {
        frame.render_widget(Paragraph::new(lines), area);
    };
    show(areas[0], look.title(screen, areas[0].width));
    show(areas[1], look.edges(screen));
    show(areas[2], look.workloads(screen));
    show(areas[4], vec![Line::styled(format!(" {note}"), look.dim())]);
    // A failure says what it has to say, over as many lines as there are.
    let totals = Paragraph::new(look.totals(screen)).wrap(Wrap { trim: false });
    frame.render_widget(totals, areas[3]);
}

impl Look {
    fn title(self, screen: &Screen, width: u16) -> Vec<Line<'static>> {
        let left = " Steadfast demo";
        let about = format!(
            "   trust domain {} · SVIDs live {}",
            screen.trust_domain,
            duration::show(screen.svid_ttl)
        );
        let clock = match screen.length {
            Some(length) => format!("{} / {} ", clock(screen.elapsed), clock(length)),
            None => format!("{} ", clock(screen.elapsed)),
        };
        let used = left.chars().count() + about.chars().count() + clock.chars().count();
        let gap = " ".repeat(usize::from(width).saturating_sub(used));
        let spans = vec![
            Span::styled(left, self.bold()),
            Span::styled(about, self.dim()),
            Span::raw(gap),
            Span::styled(clock, self.bold()),
        ];
        vec![Line::from(spans), Line::raw("")]
    }

    fn edges(self, screen: &Screen) -> Vec<Line<'static>> {
        let head = format!(
            " {:<18}{:>10}{:>11}{:>11}{:>11}",
            "REQUESTS", "per s", "success", "p50", "p99"
        );
        let mut lines = vec![Line::styled(head, self.head())];
        for edge in &screen.edges {
            lines.push(self.edge(edge));
            lines.push(self.ends(&edge.ends));
        }
        lines.push(Line::raw(""));
        lines
    }

    fn edge(self, edge: &EdgeRow) -> Line<'static> {
        let all = edge.success.is_none_or(|share| share == 1.0);
        Line::from(vec![
            Span::styled(format!(" {:<5} → {:<10}", edge.from, edge.to), self.bold()),
            Span::raw(format!("{:>10.1}", edge.requests_per_s)),
            Span::styled(format!("{:>11}", percent(edge.success)), self.judged(all)),
            Span::raw(format!("{:>11}{:>11}", millis(edge.p50), millis(edge.p99))),
        ])
    }

    fn ends(self, ends: &Ends) -> Line<'static> {
        match ends {
            Ends::Mutual { client, server } => {
                // Both are of one trust domain: said once, so that it fits.
                let domain = client.match_indices('/').nth(2).map_or(0, |(at, _)| at);
                let server = match server.strip_prefix(&client[..domain]) {
                    Some(path) if domain > 0 => format!("…{path}"),
                    _ => server.clone(),
                };
                Line::from(vec![
                    Span::styled("   mutual TLS  ", self.good()),
                    Span::styled(format!("{client} ⇄ {server}"), self.dim()),
                ])
            }
            Ends::Outside => Line::styled("   plain HTTP from outside the mesh", self.dim()),
            Ends::Unverified => Line::styled("   no verified identity yet", self.bad()),
        }
    }

    fn workloads(self, screen: &Screen) -> Vec<Line<'static>> {
        let head = format!(
            " {:<10}{:<11}{:<25}{:>9}{:>10}{:>12}",
            "IDENTITY", "serial", "age of the SVID", "renews in", "renewals", "bundle"
        );
        let mut lines = vec![Line::styled(head, self.head())];
        lines.extend(screen.workloads.iter().map(|row| self.workload(row)));
        lines.push(Line::raw(""));
        lines
    }

    fn workload(self, row: &WorkloadRow) -> Line<'static> {
        let Some(serial) = &row.serial else {
            return Line::from(vec![
                Span::styled(format!(" {:<10}", row.name), self.bold()),
                Span::styled("no SVID yet", self.bad()),
            ]);
        };
        let (age, life) = (row.age.unwrap_or_default(), row.life.unwrap_or_default());
        let next = match row.next_renewal {
            Some(left) if !left.is_zero() => duration::show(up(left)),
            _ => "now".to_owned(),
        };
        let seq = row.bundle_seq.map_or_else(|| "none".to_owned(), |seq| format!("seq {seq}"));
        let fresh = age < life;
        Line::from(vec![
            Span::styled(format!(" {:<10}", row.name), self.bold()),
            Span::raw(format!("{:<11}", serial.chars().take(8).collect::<String>())),
            Span::styled(bar(age, life), self.judged(fresh)),
            Span::raw(format!(
                " {:<12}",
                format!("{}/{}", duration::show(down(age)), duration::show(up(life)))
            )),
            Span::raw(format!("{next:>9}{:>10}{seq:>12}", row.renewals)),
        ])
    }

    fn totals(self, screen: &Screen) -> Vec<Line<'static>> {
        let well = screen.mtls_rate.is_none_or(|rate| rate == 1.0);
        let line = vec![
            Span::styled(format!(" {} requests", screen.requests), self.bold()),
            Span::raw("   "),
            Span::styled(format!("{} failed", screen.failed), self.judged(screen.failed == 0)),
            Span::raw("   "),
            Span::styled(
                format!("{} by mutual TLS with the exact SPIFFE ID", percent(screen.mtls_rate)),
                self.judged(well),
            ),
        ];
        let mut lines = vec![Line::from(line)];
        let failed = screen.first_failure.as_ref().map(|first| format!(" first failure: {first}"));
        let renewing = screen.workloads.iter().find_map(|row| {
            let why = row.last_failure.as_ref()?;
            Some(format!(" {} does not renew: {why}", row.name))
        });
        let scrape = screen.problem.as_ref().map(|why| format!(" {why}"));
        for problem in [failed, renewing, scrape].into_iter().flatten() {
            lines.push(Line::styled(problem, self.bad()));
        }
        if let Some(rotation) = &screen.rotation {
            lines.extend(rotation.done.iter().map(|done| Line::raw(format!(" ✓ {done}"))));
            lines.extend(rotation.course.iter().map(|line| Line::raw(format!(" {line}"))));
        }
        lines
    }

    fn bold(self) -> Style {
        Style::new().add_modifier(Modifier::BOLD)
    }

    fn dim(self) -> Style {
        Style::new().add_modifier(Modifier::DIM)
    }

    fn head(self) -> Style {
        if self.colours { self.bold().fg(Color::Cyan) } else { self.bold() }
    }

    fn good(self) -> Style {
        if self.colours { Style::new().fg(Color::Green) } else { Style::new() }
    }

    fn bad(self) -> Style {
        if self.colours { self.bold().fg(Color::Red) } else { self.bold() }
    }

    fn judged(self, good: bool) -> Style {
        if good { self.good() } else { self.bad() }
    }
}

/// How much of its life an SVID has behind it, in [`BAR_CELLS`] cells.
fn bar(age: Duration, life: Duration) -> String {
    let share = if life.is_zero() { 0.0 } else { age.as_secs_f64() / life.as_secs_f64() };
    let full = (share.clamp(0.0, 1.0) * BAR_CELLS as f64).round() as usize;
    "█".repeat(full) + &"░".repeat(BAR_CELLS - full)
}

/// Whole seconds: anything smaller only flickers.
fn up(duration: Duration) -> Duration {
    Duration::from_secs(duration.as_secs_f64().ceil() as u64)
}

fn down(duration: Duration) -> Duration {
    Duration::from_secs(duration.as_secs())
}

fn clock(duration: Duration) -> String {
    let secs = duration.as_secs();
    format!("{}:{:02}", secs / 60, secs % 60)
}

/// Milliseconds to what matters: 0.8 ms, 12 ms.
pub(crate) fn millis(duration: Option<Duration>) -> String {
    match duration.map(|duration| duration.as_secs_f64() * 1000.0) {
        None => "–".to_owned(),
        Some(ms) if ms < 9.95 => format!("{ms:.1} ms"),
        Some(ms) => format!("{ms:.0} ms"),
    }
}

const BAR_CELLS: usize = 12;

#[cfg(test)]
mod tests {
    use ratatui::Terminal;
    use ratatui::backend::TestBackend;

    use super::*;

    fn edge(from: &str, to: &str, ends: Ends) -> EdgeRow {
        EdgeRow {
            from: from.to_owned(),
            to: to.to_owned(),
            requests_per_s: 100.0,
            success: Some(1.0),
            p50: Some(Duration::from_micros(1_240)),
            p99: Some(Duration::from_millis(18)),
            ends,
        }
    }

    fn mutual(client: &str, server: &str) -> Ends {
        let id = |name: &str| format!("spiffe://cluster.local/ns/demo/sa/{name}");
        Ends::Mutual { client: id(client), server: id(server) }
    }

    fn workload(name: &'static str) -> WorkloadRow {
        WorkloadRow {
            name,
            serial: Some("A1B2C3D4E5F60718".to_owned()),
            age: Some(Duration::from_millis(15_100)),
            // A certificate's end has whole seconds, its issue has not.
            life: Some(Duration::from_millis(29_400)),
            next_renewal: Some(Duration::from_millis(3_200)),
            renewals: 3,
            bundle_seq: Some(1),
            last_failure: None,
        }
    }

    fn screen() -> Screen {
        Screen {
            elapsed: Duration::from_secs(42),
            length: Some(Duration::from_secs(60)),
            trust_domain: "cluster.local".to_owned(),
            svid_ttl: Duration::from_secs(30),
            requests: 4200,
            failed: 0,
            mtls_rate: Some(1.0),
            first_failure: None,
            edges: vec![
                edge("you", "web", Ends::Outside),
                edge("web", "api", mutual("web", "api")),
                edge("api", "store", mutual("api", "store")),
            ],
            workloads: vec![workload("web"), workload("api"), workload("store")],
            rotation: None,
            problem: None,
        }
    }

    fn drawn(screen: &Screen, width: u16) -> Vec<String> {
        let mut terminal = Terminal::new(TestBackend::new(width, 24)).unwrap();
        let look = Look { colours: false };
        terminal.draw(|frame| draw(frame, screen, "q or Ctrl-C ends it", look)).unwrap();
        let buffer = terminal.backend().buffer().clone();
        let lines = buffer.content.chunks(usize::from(width));
        lines
            .map(|cells| cells.iter().map(|cell| cell.symbol()).collect::<String>())
            .map(|line| line.trim_end().to_owned())
            .collect()
    }

    #[test]
    fn the_whole_view_fits_into_80_columns_and_24_lines() {
        let expected = [
            " Steadfast demo   trust domain cluster.local · SVIDs live 30s       0:42 / 1:00",
            "",
            " REQUESTS               per s    success        p50        p99",
            " you   → web            100.0      100 %     1.2 ms      18 ms",
            "   plain HTTP from outside the mesh",
            " web   → api            100.0      100 %     1.2 ms      18 ms",
            "   mutual TLS  spiffe://cluster.local/ns/demo/sa/web ⇄ …/ns/demo/sa/api",
            " api   → store          100.0      100 %     1.2 ms      18 ms",
            "   mutual TLS  spiffe://cluster.local/ns/demo/sa/api ⇄ …/ns/demo/sa/store",
            "",
            " IDENTITY  serial     age of the SVID          renews in  renewals      bundle",
            " web       A1B2C3D4   ██████░░░░░░ 15s/30s            4s         3       seq 1",
            " api       A1B2C3D4   ██████░░░░░░ 15s/30s            4s         3       seq 1",
            " store     A1B2C3D4   ██████░░░░░░ 15s/30s            4s         3       seq 1",
            "",
            " 4200 requests   0 failed   100 % by mutual TLS with the exact SPIFFE ID",
        ];
        let lines = drawn(&screen(), 80);
        assert_eq!(lines[..expected.len()], expected, "\n{}", lines.join("\n"));
        assert_eq!(lines[23], " q or Ctrl-C ends it");
    }

    #[test]
    fn what_is_wrong_is_said() {
        let mut screen = screen();
        screen.failed = 2;
        let long = "answered 502: web: api.demo.svc.cluster.local answers 503: there is no service";
        screen.first_failure = Some(format!("{long} of that name"));
        screen.mtls_rate = Some(0.9999);
        screen.edges[1].ends = Ends::Unverified;
        screen.edges[1].success = Some(0.5);
        screen.workloads[0].serial = None;
        screen.workloads[1].last_failure = Some("no answer".to_owned());
        screen.workloads[2].next_renewal = None;
        screen.problem = Some("127.0.0.1:1 does not answer".to_owned());
        let text = drawn(&screen, 80).join("\n");
        for words in [
            "2 failed",
            "first failure: answered 502",
            "of that name",
            "99.99 %",
            "no verified identity yet",
            "50.00 %",
            "no SVID yet",
            "api does not renew: no answer",
            "now",
        ] {
            assert!(text.contains(words), "{words:?} is not in\n{text}");
        }
    }

    #[test]
    fn a_narrow_or_tiny_terminal_is_no_reason_to_fail() {
        for width in [20, 40, 1] {
            assert_eq!(drawn(&screen(), width).len(), 24);
        }
    }

    #[test]
    fn a_bar_shows_the_share_of_the_life() {
        let secs = Duration::from_secs;
        assert_eq!(bar(secs(0), secs(10)), "░".repeat(BAR_CELLS));
        assert_eq!(bar(secs(20), secs(10)), "█".repeat(BAR_CELLS));
        assert_eq!(bar(secs(1), secs(0)), "░".repeat(BAR_CELLS));
    }
}
