//! Numbers as people read them, in exactly the forms that scripts parse.

/// C's `%.3g`.
fn three_digits(v: f64) -> String {
    if v == 0.0 {
        return "0".into();
    }
    let e = format!("{v:.2e}");
    let Some((mantissa, exponent)) = e.split_once('e') else { return e };
    let exponent: i32 = exponent.parse().unwrap_or(0);
    if !(-4..3).contains(&exponent) {
        let sign = if exponent < 0 { '-' } else { '+' };
        return format!("{}e{sign}{:02}", trim(mantissa), exponent.abs());
    }
    trim(&format!("{v:.*}", (2 - exponent) as usize)).to_owned()
}

fn trim(s: &str) -> &str {
    if s.contains('.') { s.trim_end_matches('0').trim_end_matches('.') } else { s }
}

/// A size as `img info` shows it: `1.38 MiB`, three significant digits, the next unit from
/// 1000 on.
pub(crate) fn size(bytes: u64) -> String {
    const UNITS: [&str; 7] = ["B", "KiB", "MiB", "GiB", "TiB", "PiB", "EiB"];
    let mut unit = 0;
    let mut v = bytes as f64;
    while v >= 1000.0 && unit + 1 < UNITS.len() {
        v /= 1024.0;
        unit += 1;
    }
    format!("{} {}", three_digits(v), UNITS[unit])
}

/// A size as `io` shows it: `1.465 KiB`, `100 bytes`, at most three decimals.
pub(crate) fn io_size(v: f64) -> String {
    const UNITS: [&str; 6] = ["KiB", "MiB", "GiB", "TiB", "PiB", "EiB"];
    if v < 1024.0 {
        let s = format!("{v:.6}");
        return format!("{} bytes", s.strip_suffix(".000000").unwrap_or(&s));
    }
    let mut v = v / 1024.0;
    let mut unit = 0;
    while v >= 1024.0 && unit + 1 < UNITS.len() {
        v /= 1024.0;
        unit += 1;
    }
    let s = format!("{v:.3}");
    format!("{} {}", s.strip_suffix(".000").unwrap_or(&s), UNITS[unit])
}

/// A duration as `io` shows it: `00.02` below a minute, `0:36:29.43` above, the long form
/// always when `fixed`.
pub(crate) fn io_time(t: std::time::Duration, fixed: bool) -> String {
    let (secs, hundredths) = (t.as_secs(), t.subsec_micros() / 10_000);
    let (h, m, s) = (secs / 3600, secs / 60 % 60, secs % 60);
    if fixed || secs >= 60 {
        format!("{h}:{m:02}:{s:02}.{hundredths:02}")
    } else {
        format!("{s:02}.{hundredths:02}")
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Duration;

    #[test]
    fn sizes_of_info() {
        // Captured from qemu-img 10.0.2.
        for (n, text) in [
            (0, "0 B"),
            (512, "512 B"),
            (1024, "1 KiB"),
            (1536, "1.5 KiB"),
            (102_400, "100 KiB"),
            (197_120, "192 KiB"),
            (1_000_448, "977 KiB"),
            (1_023_488, "1e+03 KiB"),
            (1_024_000, "0.977 MiB"),
            (1_048_576, "1 MiB"),
            (1_445_888, "1.38 MiB"),
            (1_047_527_424, "999 MiB"),
            (1_100_000_000_000, "1 TiB"),
        ] {
            assert_eq!(size(n), text);
        }
    }

    #[test]
    fn sizes_of_io() {
        for (n, text) in [
            (0.0, "0 bytes"),
            (100.0, "100 bytes"),
            (1.870_805, "1.870805 bytes"),
            (1023.0, "1023 bytes"),
            (1025.0, "1.001 KiB"),
            (1500.0, "1.465 KiB"),
            (4096.0, "4 KiB"),
            (4_063_232.0, "3.875 MiB"),
            (104_857_600.0, "100 MiB"),
        ] {
            assert_eq!(io_size(n), text);
        }
    }

    #[test]
    fn times() {
        assert_eq!(io_time(Duration::from_millis(20), false), "00.02");
        assert_eq!(io_time(Duration::from_millis(2_189_430), false), "0:36:29.43");
        assert_eq!(io_time(Duration::from_millis(20), true), "0:00:00.02");
    }
}
